"""The plain tree of parameters that jitted and differentiated functions take."""

from typing import Any

Params = dict[str, Any]
