"""One module a backend: `why_not`, `ready`, and `<op>_fwd` / `<op>_bwd` for each operator it serves."""
