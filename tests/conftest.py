"""Settings of every test."""

from hypothesis import HealthCheck, settings

# A busy machine draws slowly; what is drawn is what counts.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
