// Sphinx's own scores, but for `score`: among pages that only contain the words, those that tell how
// to do something come first, and what has been comes last.
var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    score +
    (/\/(tutorials|how_to)\//.test(page) ? 2 : 0) -
    (/^(docs\/LOG|CHANGELOG|CONTRIBUTING)$/.test(page) ? 2 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
