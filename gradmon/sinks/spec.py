"""From a string to a sink."""

from __future__ import annotations

from gradmon import _plugins
from gradmon._errors import ArgumentError, PluginError
from gradmon.sinks.base import Sink


def make_sink(spec: Sink | str) -> Sink:
    """Make the sink that a string describes; a sink is returned as it is.

    Args:
        spec: A sink, or the name under which its class is installed in the entry-point group ``gradmon.sinks``,
            followed by a colon and that class's argument where it takes one: ``"log"``, ``"jsonl:run.jsonl"``,
            ``"tensorboard:runs/x"``, ``"prometheus:9464"``.

    Returns:
        The sink.

    Raises:
        ArgumentError: `spec` is neither a sink nor a string that begins with an installed name, or the sink's class
            does not accept the argument.
        PluginError: What is installed under the name cannot be imported, or is no class with a ``from_spec``.

    Example:
        >>> make_sink("memory").readings
        []
    """
    if not isinstance(spec, str):
        # A class has the same methods as its objects, so the protocol alone would let it through.
        if isinstance(spec, type) or not isinstance(spec, Sink):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("sinks", "be sinks (with write, alert and close) or strings", repr(spec))
        return spec
    name, _, argument = spec.partition(":")
    installed = _plugins.entry_points_named(_plugins.SINKS)
    if name not in installed:
        must = f"begin with the name of an installed sink ({', '.join(installed) or 'none is installed'})"
        raise ArgumentError("sinks", must, repr(spec))
    from_spec = getattr(_plugins.load(_plugins.SINKS, name), "from_spec", None)
    if not callable(from_spec):
        must = "be a class with a class method `from_spec`"
        raise PluginError(f"{installed[name].value}, installed in `{_plugins.SINKS}` as {name!r}, must {must}.")
    sink = from_spec(argument)
    if not isinstance(sink, Sink):
        raise PluginError(f"{installed[name].value}.from_spec must return a sink. Got {sink!r}.")
    return sink
