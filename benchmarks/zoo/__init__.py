"""The zoo: random training configurations, whether they train, and what could be seen before the first step."""
