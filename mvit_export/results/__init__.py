"""What was found out about an artifact, as stored on disk: parity.json, latency.json, accuracy.json.

Each kind has one record, which its writer fills, `to_json` writes and `from_json` reads and checks.
"""
