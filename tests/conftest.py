"""Settings of every test, and the database server that some of them need."""

from hypothesis import HealthCheck, settings

from postgres_server import postgres

__all__ = ["postgres"]

# A busy machine draws slowly; what is drawn is what counts.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
