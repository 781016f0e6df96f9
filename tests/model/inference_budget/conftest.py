"""What tests of this package share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of what is compiled from now on."""
    names: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def kernels_are_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a test of the kernel, which is its module's KERNEL, would have taken the scan."""
    kernel, taken = request.module.KERNEL, []
    times = kernel.times
    monkeypatch.setattr(kernel, "times", lambda *a: taken.append(a) or times(*a))
    yield
    assert taken
