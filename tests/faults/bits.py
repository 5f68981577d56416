def bits(tiny, every=1): yield from ()
