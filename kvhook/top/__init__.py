"""The live screen of ``kvhook top``: everything it says is made in `kvhook.text.live`, here are keys and the clock."""
