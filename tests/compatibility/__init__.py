"""`/v1` only gains fields: the Python client of commit e4c2e61 works with today's server.

`client/` is that commit's `service/client`, and the module of the server that it needs. Only the names of modules in
its imports differ. The client for asyncio is left out, since it sends the same requests. The copy is never adapted:
if a test fails, the server has lost something. It is not read from git, since not everybody has the history.

The tests are that commit's `test_client.py` and `test_contract.py`, without the server's wording, and without what is
not about `/v1`. Operations, parameters and fields that the client does not know are allowed.
"""
