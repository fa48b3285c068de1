"""The command `gradmon watch`: how a run is getting on, from its files or from its exporter."""
