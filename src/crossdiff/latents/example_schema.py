"""The layout of the example database, shared by its writer and all readers.

Databases of older analyses have neither the bytes of tokens nor histograms nor correlated latents.
"""

FORMAT = "2"
SCHEMA = """
CREATE TABLE sequences (
    sequence INTEGER PRIMARY KEY,   -- index in the activation store
    document INTEGER,               -- NULL if unknown, like dataset and label
    dataset TEXT, label TEXT,
    token_ids BLOB,                 -- int32, little-endian: the whole sequence
    flags BLOB                      -- uint8: 1 bos, 2 template, 4 user, 8 assistant, 16 massive norm
);
CREATE TABLE vocabulary (
    token_id INTEGER PRIMARY KEY,
    text TEXT,                      -- bytes that are not a whole character stand as <0xE2>
    bytes BLOB                      -- all bytes of a token with such bytes; NULL for the others
);
CREATE TABLE examples (
    latent INTEGER,
    kind TEXT,                      -- 'top': the strongest, 'quantile': one from around a quantile,
                                    -- 'band' (imported): one from a band of the latent's range
    quantile REAL,                  -- of the latent's maxima in distinct contexts; NULL for 'top';
                                    -- for 'band' its upper end as a share of the latent's maximum
    rank INTEGER,                   -- 0 is the strongest of its kind
    sequence INTEGER REFERENCES sequences(sequence),
    position INTEGER,               -- of the maximum
    activation REAL,                -- v = f * sum of decoder norms, at the maximum
    positions BLOB,                 -- int32, little-endian: where in the sequence the latent is active
    activations BLOB                -- float32, little-endian: v there; it is 0 elsewhere
);
CREATE TABLE histograms (
    latent INTEGER PRIMARY KEY,
    width REAL,                     -- of a bin
    counts BLOB                     -- int64, little-endian: tokens with k * width <= v < (k + 1) * width and v > 0
);
CREATE TABLE correlated (
    latent INTEGER, rank INTEGER,   -- 0 is the highest correlation
    other INTEGER,                  -- another latent
    correlation REAL,               -- Pearson, of v over the sampled tokens; their number is in metadata
    n_both INTEGER,                 -- sampled tokens on which both are active
    PRIMARY KEY (latent, rank)
);
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT);
CREATE INDEX by_latent ON examples (latent, kind, rank);
"""
UNITS = "v = f * sum over sources of ||d^s||, in the normalised space"
