"""What all tests share."""

import hypothesis

# Derandomised, so that a run that was green stays green; deadlines would measure the machine.
hypothesis.settings.register_profile(
    "fastformer",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fastformer")
