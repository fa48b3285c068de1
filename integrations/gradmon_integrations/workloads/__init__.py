"""Reference workloads: published training methods that change what gradmon measures, watched by it."""
