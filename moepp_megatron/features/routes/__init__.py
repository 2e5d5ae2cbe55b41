"""Router replay, and traces of routing (`routes`).

settings.py  the section `routes`
part.py  writes the experts that tokens take to files, and lets routers repeat those of files
"""
