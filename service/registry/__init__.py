"""The SQL registry: tables, and the queries on them. API and workers share it, and it imports neither."""
