"""The rule that splits text into sentences, and the one that tells wrapped lines from paragraphs."""

import pytest

from electra_core.corpora.sentences import looks_wrapped, split_document, split_sentences


def test_sentences_of_a_paragraph() -> None:
    text = (
        'Mr. J. Smith of the U.S. Navy left. "Why?" he asked. (Nobody knew.) See No. 5 of Prof. Moriarty\'s list! '
        "It was 3.5 m long... Then – nothing. éclair is lower case. Ça va? 東京。"
    )
    assert list(split_sentences(text)) == [
        "Mr. J. Smith of the U.S. Navy left.",
        '"Why?" he asked.',
        "(Nobody knew.)",
        "See No. 5 of Prof. Moriarty's list!",
        "It was 3.5 m long...",
        "Then – nothing. éclair is lower case.",
        "Ça va?",
        "東京。",
    ]
    assert list(split_sentences("  ")) == [] and list(split_sentences("Heading")) == ["Heading"]


@pytest.mark.parametrize(
    "text",
    [
        "今日は晴れです。|明日は雨でしょう。|本当ですか？！|はい！",
        "「行きますか？」と聞いた。|「はい。」|彼は笑った。",
        "他说：“你好！”|我们走了。|3.5米。",
        "वह गया। |मैं आया। |तुम कौन हो? |हाँ॥",
        "أين كنت؟ |ذهبت إلى المدرسة. |نعم",
        "وہ گیا۔ |میں آیا۔",
        "Նա գնաց։ |Ես եկա։",
        "እሱ ሄደ። |እኔ መጣሁ።",
        "သူသွားသည်။ |ငါလာသည်။",
        "Hola. |¿Cómo estás? |¡Muy bien! |(¿Y tú?) |Bien.",
        "„Hallo.“ |Er ging. |»Wer da?« |Niemand. |‚So?‘ |„Über ‚Berg.‘“ |Ende",
        "« Bonjour. » |Il partit. |«\u00a0Où\u00a0?\u00a0» |Elle rit. |« Là. » |« Ici ! »",
        "Он ушёл. |«Да.» |Она — нет. |Это 5 тыс. рублей и т. д. до конца. |Ещё.",
        "Był np. łatwy. |Źle bzw. übel. |Zu\u0308rich. |U\u0308ber π.χ. ή έτσι. |Έτσι vb. şey.",
        "გამარჯობა. |როგორ ხარ? |კარგად.",
    ],
)
def test_marks_of_other_scripts_end_sentences(text: str) -> None:
    assert list(split_sentences(text.replace("|", ""))) == [part.strip() for part in text.split("|")]


@pytest.mark.parametrize(
    "line",
    [
        "去年我们在北京学习中文，老师告诉我们很多有意思的故事，大家都觉得非常高兴，也学到了很多新的知识和方法。",
        "去年我们在北京学习中文，老师告诉我们很多有意思的故事，大家都觉得非常高兴，也学到了很多新的知识和方法",
        "ครูเล่าเรื่องที่น่าสนใจมากมายให้พวกเราฟังเมื่อปีที่แล้วที่กรุงเทพ",
        "हमने पिछले साल दिल्ली में हिन्दी सीखी और शिक्षक ने बहुत कहानियाँ सुनाईं।",
        "ذهبنا في العام الماضي إلى القاهرة، فهل تعلمنا اللغة العربية هناك؟",
    ],
)
def test_paragraphs_in_other_scripts_are_not_taken_for_wrapped_lines(line: str) -> None:
    assert not looks_wrapped([line] * 6) and split_document([line] * 6) == [line] * 6


def test_lines_are_joined_where_they_are_wrapped() -> None:
    wrapped = [
        "It was a bright cold day in the north, and the clocks were all",
        "striking at once. The people on the bridge looked up, but the tower",
        "stood as it always had. Nobody could say afterwards who had been the",
        "first to run.",
    ]
    paragraphs = [
        "Title",
        "One sentence that is rather long. And one more.",
        "And a third, longer one, too.",
        "End.",
    ]
    poem = ["Short lines", "of a list", "or of verse", "go on", "their own"]
    assert [looks_wrapped(lines) for lines in (wrapped, paragraphs, poem)] == [True, False, False]
    assert split_document(wrapped) == [
        "It was a bright cold day in the north, and the clocks were all striking at once.",
        "The people on the bridge looked up, but the tower stood as it always had.",
        "Nobody could say afterwards who had been the first to run.",
    ]
    assert split_document(poem) == poem and len(split_document(poem, "wrapped")) == 1
    assert split_document(paragraphs)[1:3] == ["One sentence that is rather long.", "And one more."]
    assert split_document([" a. B. ", " "], "sentence") == ["a. B."]
    with pytest.raises(ValueError, match="mode: expected one of"):
        split_document([], "lines")
