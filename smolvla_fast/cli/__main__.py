"""``python -m smolvla_fast.cli``, for where the ``smolvla-fast`` script is not on the path."""

import sys

from . import main

sys.exit(main())
