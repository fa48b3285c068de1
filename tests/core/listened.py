"""What a listener has found in some passes."""

from gradmon.per_example import Listener


def found_in(model, run, batch=None, **options):
    listener = Listener(model, **options)
    listener.arm()
    run()
    try:
        return listener.collect(batch)
    finally:
        listener.disarm()
