"""Recording: the session, one recorder per engine, the spool that copies rings to disk, and the overhead budget.

- `installation`: `install`, `uninstall` and `attach`; which session is the installed one
- `session`: `Session`, what is made for each engine and what can be read of it
- `plan`: what is to be done with a new engine, decided without touching it
- `recorder`: one engine's facts, its ring, and the two functions of the step path
- `spool`: the thread that copies rings to trace files; `segments`: those files; `background`: how the thread is started
- `running`: the run so far, added up as those files grow
- `budget`, `overhead`: what recording costs, and the limit on it

Threads
-------

No lock is taken in a step. vLLM lets one thread at a time step an engine, and kvhook relies on that as vLLM does.

================================ ========================== ========================================================
What runs                        In which thread            What keeps it safe
================================ ========================== ========================================================
`on_step`, ``record``,           the one that steps the     No lock: this thread is the only writer of the ring and
``publish``, taps,               engine (AsyncLLM: that of  of the publisher's variables. It looks into
`OverheadMonitor.sample`,        the event loop)            ``registry.steps``, and does not change it.
`StatsProbe`
a hook that fails                the same                   No lock: it removes its own key from a dictionary, which
                                                            does not touch other keys.
`hooks.step_down`,               the same, between two      No lock: only this engine's entries are changed. The
`Spool.write_meta_again`         steps                      number is added to a set that the spool's thread
                                                            empties; both are single operations.
building an engine,              any that builds an engine  ``session.lock``, and in it ``Spool._lock``. The engine
`Session.open_engine`                                       that is being built is in a context variable: two
                                                            threads that build engines do not see each other's.
`install`, `uninstall`,          any                        ``session.lock``.
`Session.close`
`forget`,                        any: finalizers run where  Waits for no lock: `retire` appends to a deque, and
`Session.close_engine`,          the garbage collector runs drains at once only if ``Spool._lock`` is free.
`Spool.retire`, `Spool.leave`
`Spool.drain`, and all else that "kvhook-spool", and any    ``Spool._lock``. It reads the rings as another process
writes trace files               that reads or closes       does: without a lock; the stamps say what was
                                                            overwritten meanwhile.
`Session.trace`, and what reads  any                        ``Spool._lock`` while the files are listed. Then it
with it                                                     reads them through descriptors of its own.
`Session.summary`,               any, and "kvhook-spool"    ``Running._lock`` for the totals, and in it
`Session.ask`,                                              ``Spool._lock`` while the files are listed. The spool's
`Running.keep_up`                                           thread takes no other lock in there: ``close`` waits for
                                                            it and holds ``session.lock``.
a function of `on_step`          "kvhook-on-step"           It reads the rings as another process does: without a lock.
                                                            ``close`` waits ten seconds at most for it, since the
                                                            function may ask for ``session.lock``.
patching on import               any that imports vLLM      The lock that Python holds while it imports a module.
`Faults.fault`                   any                        No lock: of two faults at the same moment one may not be
                                                            counted.
after a fork                     the child's only one       `kvhook.forks`: the child clears the registry, and the
                                                            parent's session and rings do nothing there.
================================ ========================== ========================================================

Locks are taken in this order: ``session.lock``, then ``Running._lock``, then ``Spool._lock``, then
``Recorder._closing``.

In a free-threaded Python, little of this changes. The ring's protocol does not rest on the interpreter's lock: its
readers may be other processes. Dictionaries, sets and deques lock themselves there, so that the single operations above
stay single. What would need a lock of its own is counting in `Faults.fault`, which can lose a count now and would lose
more. No such build has been tested.
"""
