"""What a verb of the command line does: one file each, which hands every part its own slice of the configuration."""
