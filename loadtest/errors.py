"""What the load tester refuses to do, in words for the person who started it."""


class LoadtestError(Exception):
    """A scenario, a trace, a flag or a server's answer that no run can be made of; the message says the way out."""


class InvalidScenario(LoadtestError):
    """A scenario file, or an override of it, that means nothing."""


class InvalidTrace(LoadtestError):
    """A trace file that is missing or not in the format its name promises."""


class ServerRefused(LoadtestError):
    """The server under test did not answer what setting up or changing adapters needs."""
