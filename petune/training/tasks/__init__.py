"""The built-in tasks, one file each; they register as a plugin's tasks do."""
