"""Jobs on clusters: batch scripts rendered from the configuration."""
