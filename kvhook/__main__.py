"""``python -m kvhook`` is ``kvhook``."""

import sys

from kvhook.cli import main

sys.exit(main())
