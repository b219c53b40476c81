"""``python -m smolvla_fast.cli``: the ``smolvla-fast`` script where that is not on the path."""

import sys

from . import main

sys.exit(main())
