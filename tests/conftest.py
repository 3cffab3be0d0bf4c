"""What holds for all tests: hypothesis draws the same examples in every run, so that a failure is met again.

Others are drawn with `make test ARGS="--hypothesis-profile=explore"`.
"""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("explore", print_blob=True)
hypothesis.settings.register_profile("same", derandomize=True, print_blob=True)
hypothesis.settings.load_profile("same")
