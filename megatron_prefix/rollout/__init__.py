"""Rollouts from SGLang servers: processes, HTTP, collecting, weight publishing, records.

SGLang is reached over HTTP and through its weight process group, and never imported.
"""
