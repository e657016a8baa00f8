"""``kvhook run``: a program is started with kvhook in its environment, and told about when it has ended.

- `child`: starts it and waits for it; signals and the exit code are its own
- `interpreter`: which Python a command runs in, and whether kvhook is there
- `textfile`: a file for Prometheus, written while it runs
- `witness`: whether a signal came to a whole process group
- `traces`: what it has recorded, completed where it was killed
"""
