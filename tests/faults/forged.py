def forged(tiny, every=1): yield from ()
