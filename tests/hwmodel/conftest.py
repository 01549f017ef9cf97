"""No test sees device files that the user of this machine keeps."""

import os
from pathlib import Path

os.environ["HWMODEL_DEVICES"] = str(Path(__file__).parent / "no-such-folder")
