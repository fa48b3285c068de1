"""How readings are shown as text: what a demo, a panel in the terminal, a report and `gradmon watch` share."""
