"""Video memory is a budget, and a budget is a test.

Importing this package imports neither torch nor pytest.
"""

from __future__ import annotations

__version__ = "0.1.0"
