"""Prometheus rules, Alertmanager and Grafana set-up, as files; and what the Grafana dashboards are built from."""
