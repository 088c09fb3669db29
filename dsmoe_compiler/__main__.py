"""`python -m dsmoe_compiler` is the command `dsmoe`."""

import sys

from dsmoe_compiler.cli import main

sys.exit(main())
