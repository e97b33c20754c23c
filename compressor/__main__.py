"""`python -m compressor`: the command line, where no script is on the path."""

import sys

from compressor.cli import main

sys.exit(main())
