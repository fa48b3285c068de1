"""The colours of the page, for light and dark screens. Text has a contrast of at least 4.5 to 1 in both."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "page": "#f6f7f9",
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "quiet": "#565e68",
    "rule": "#d5dae0",
    "link": "#0b5cad",
    "band": "#e2f2e8",
    "limit": "#8a4b00",
    "good": "#0a6b3d",
    "note": "#8a4b00",
    "bad": "#b00020",
    "info": "#0b5cad",
    "step": "#f3cfa8",
    "batch": "#bfd8f0",
    "differs": "#fdf0d0",
    "r0": "#0b5cad",
    "r1": "#b3370d",
    "r2": "#00705a",
    "r3": "#8a3a8f",
    "r4": "#7d5200",
    "r5": "#565e68",
    "r6": "#b01657",
    "r7": "#2b6777",
    "h0": "#e6eff8",
    "h1": "#cbdff1",
    "h2": "#a5c9e6",
    "h3": "#76acd6",
    "h4": "#4a8cc2",
    "h5": "#2a6aa6",
    "h6": "#164a80",
    "h7": "#082c50",
}
DARK: Mapping[str, str] = {
    "page": "#0f1216",
    "paper": "#171b21",
    "ink": "#e8ebef",
    "quiet": "#a9b2bd",
    "rule": "#363d47",
    "link": "#7dbcff",
    "band": "#1b3426",
    "limit": "#ffb454",
    "good": "#5fd699",
    "note": "#ffb454",
    "bad": "#ff8f96",
    "info": "#7dbcff",
    "step": "#6b4620",
    "batch": "#264a6e",
    "differs": "#3a3115",
    "r0": "#6cb4ff",
    "r1": "#ff9c70",
    "r2": "#4fd1a5",
    "r3": "#dda6e4",
    "r4": "#e0b84d",
    "r5": "#b4bac2",
    "r6": "#ff8db8",
    "r7": "#7fd3ee",
    "h0": "#16283c",
    "h1": "#1b3a58",
    "h2": "#234f77",
    "h3": "#2f6799",
    "h4": "#4583b9",
    "h5": "#6aa3d6",
    "h6": "#9cc5ea",
    "h7": "#dcecfb",
}


def variables(colours: Mapping[str, str]) -> str:
    """The colours as custom properties of CSS."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())
