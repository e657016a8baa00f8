"""A run as a page that a browser opens, and as a picture. Renderings only: the numbers are made in `kvhook.analysis`.

`runs` reads a trace in one pass, with `lines`, `buckets` and `requests`, which reduce it as it comes. `charts` is the
table of what is drawn, `page` puts the file together, and the scripts in ``assets`` draw it.
"""
