def requests(tiny, every=1): yield from ()
