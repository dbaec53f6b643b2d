"""Put the project's folder on the import path, so that `python tools/NAME.py` finds its modules."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
