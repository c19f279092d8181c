"""Fixtures come from the modules named here; servers are real, and started by the tests."""

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.fix_servers", "tests.fix_processes"]

_quiet = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=60, **_quiet)
settings.register_profile("long", max_examples=2_000, **_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
