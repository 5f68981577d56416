"""The first look at two models, before anything is trained: where they speak differently, at which layer, and about what."""
