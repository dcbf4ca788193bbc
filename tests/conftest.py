"""Settings of every test, and the database server that some of them need."""

import signal

from hypothesis import HealthCheck, settings

from postgres_server import postgres

__all__ = ["postgres"]

# A busy machine draws slowly; what is drawn is what counts. It is the same in every run, so
# that a change is to blame for what fails; --hypothesis-profile=search draws anew.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", settings.get_profile("search"), derandomize=True)
settings.load_profile("tests")

# Of a run in the background (nohup, & in a script) programs would inherit that Ctrl-C is
# ignored; what is tested of them is what it does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
