"""Settings of whole runs, one YAML file each."""
