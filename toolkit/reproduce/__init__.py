"""`toolkit reproduce`: the tables and figures of Thorsteinsson et al. 2024, and what they left out.

`protocol` says how networks are trained, `recipes` what is done to one, `steps` names each piece of work by a digest,
`store` keeps what came of it, `work` does it, `targets` lists the tables' and figures' cells with the paper's numbers
(`paper`), `runner` fills them, `render` and `plots` show them.
"""
