"""Recording: the session, one recorder per engine, the spool that copies rings to disk, and the overhead budget.

- `installation`: `install`, `uninstall` and `attach`; which session is the installed one
- `session`: `Session`, what is made for each engine and what can be read of it
- `plan`: what is to be done with a new engine, decided without touching it
- `recorder`: one engine's facts, its ring, and the two functions of the step path
- `spool`: the thread that copies rings to trace files
- `budget`, `overhead`: what recording costs, and the limit on it

Threads
-------

No lock is taken in a step. What is written there has one writer each: the thread that steps the engine. vLLM's engines
are stepped by one thread at a time, and kvhook relies on that as vLLM itself does.

=====================================  =============================  ================================================
What runs                              In which thread                What keeps it safe
=====================================  =============================  ================================================
`on_step`, ``record``, ``publish``,    the one that steps the         no lock; the ring and the publisher's variables
taps, `OverheadMonitor.sample`,        engine (AsyncLLM: the event    have this thread as their only writer. It looks
`StatsProbe`                           loop's)                        into ``registry.steps``, and never changes it
                                                                      while all goes well
`Session` step-down,                   the same, between two steps    no lock; only this engine's entry is changed.
`hooks.step_down`,                                                    `write_meta_again` adds to a set that the spool
`Spool.write_meta_again`                                              empties: both are single operations
a failure in a hook                    the same                       no lock; it removes its own key from a dictionary,
                                                                      which harms no other key
`Session.open_engine`, building        any thread that builds an      ``session.lock``; ``Spool._lock`` inside it. What is
an engine                              engine                         being built is in a context variable, so that two
                                                                      threads that build engines do not meet
`install`, `uninstall`, `attach`,      any                            ``session.lock``
`Session.close`
`forget`, `Session.close_engine`,      any: finalizers run where      takes no lock that it would have to wait for:
`Spool.retire`                         the garbage collector runs     `retire` appends to a deque, and drains at once only
                                                                      if ``Spool._lock`` is free
`Spool.drain` and all that writes      the thread "kvhook-spool",     ``Spool._lock``. It reads the rings as any other
trace files                            and any thread that reads      process would: without a lock, and stamps tell it
                                       (`Session.trace`, `close`)     what was overwritten meanwhile
`Session.trace` and what reads with    any                            ``Spool._lock`` while the files are listed; then
it                                                                    descriptors of their own
patching on import                     any thread that imports vLLM   the import lock of that module
`Faults.fault`                         any                            no lock: two faults at the same moment may be
                                                                      counted once
after a fork                           the child's only thread        `kvhook.forks`: the child clears the registry, and
                                                                      the parent's session and rings refuse to be written
=====================================  =============================  ================================================

Locks are taken in this order: ``session.lock``, then ``Spool._lock``, then ``Recorder._closing``.

A free-threaded Python changes three things. The ring's protocol rests on the order of stores, which such a build does
not give to a reader in another thread of the same process, so that records would have to carry a crc everywhere (as
they do on ARM64 now, see `kvhook.recording.recorder.NEEDS_CRC`). Counting faults and emptying ``Spool._meta_due`` rest
on single operations being indivisible: the first needs a lock, the second is safe, because sets lock themselves there.
And ``registry.steps`` may be changed by one thread while another looks up a key of its own, which dictionaries of such
a build allow.
"""
