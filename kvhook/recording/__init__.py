"""Recording: the session, one recorder per engine, the spool that copies rings to disk, and the cost budget."""
