"""The programs behind the commands. Each file reads from top to bottom; its options are in `configs`."""
