"""One command for every claim about speed or packing. README.md lists them with their figures."""
