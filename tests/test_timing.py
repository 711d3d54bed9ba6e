import time

from emadapt import timing


def test_waiting_takes_time_and_no_processor() -> None:
    seconds, cpu = timing.timed(lambda: time.sleep(0.2))
    assert seconds >= 0.2
    assert cpu < 0.1


def test_work_takes_both() -> None:
    def work() -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    seconds, cpu = timing.median_timed(work, 1)
    assert seconds > 0.1
    assert 0.1 < cpu < 0.4


def test_a_clock_that_does_not_tick_gives_no_zero(monkeypatch) -> None:
    """As of a step of a tiny model where the processor's time is counted in ticks of 10 ms."""
    still = timing.resource.getrusage(timing.resource.RUSAGE_SELF)
    monkeypatch.setattr(timing.resource, "getrusage", lambda who: still)
    seconds, cpu = timing.timed(lambda: sum(range(1000)))
    assert 0 < seconds == cpu
