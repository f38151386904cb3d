"""One Ctrl-C is a wish, two are an order; handlers are left as found."""

import os
import signal
import threading

import pytest

from flatkern.estimators.interrupt import Interruptible


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_the_first_asks_and_the_second_raises():
    with Interruptible() as stop:
        assert not stop.requested
        ctrl_c()
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
def test_the_handler_is_restored():
    for error in (None, RuntimeError("of the operator")):
        try:
            with Interruptible():
                assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
                if error:
                    raise error
        except RuntimeError:
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


@pytest.mark.usefixtures("default_handler")
def test_a_handler_of_the_users_own_is_called_too():
    calls = []

    def own(number, frame):
        calls.append(number)

    signal.signal(signal.SIGINT, own)
    with Interruptible() as stop:
        ctrl_c()
    assert stop.requested
    assert calls == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own


@pytest.mark.usefixtures("default_handler")
def test_one_inside_another_tells_the_outer_one():
    with Interruptible() as outer:
        with Interruptible() as inner:
            ctrl_c()
        assert inner.requested
        assert outer.requested


@pytest.mark.usefixtures("default_handler")
def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruptible() as stop:
        ctrl_c()
    assert not stop.requested
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.usefixtures("default_handler")
def test_another_thread_does_nothing():
    seen = []

    def work():
        with Interruptible() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]
