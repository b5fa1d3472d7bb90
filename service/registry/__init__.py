"""The SQL registry, shared by service and worker: tables and sessions. Imports neither of the two."""
