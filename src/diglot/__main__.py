"""`python -m diglot`."""

import sys

from diglot.cli.main import main

sys.exit(main())
